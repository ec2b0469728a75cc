"""What training over many devices would take, from what was measured on few."""
