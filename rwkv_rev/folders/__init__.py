"""Files and folders, whatever is in them: named, found here or on the Hub, read with care, written whole, published."""
