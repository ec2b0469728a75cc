"""What is asked of a context in training, chosen by ``--objective``: one file for each, with its equation.

| objective | rows | what counts |
|---|---|---|
| ``next-token`` | documents, as they are | every token the same |
| ``position-weighted`` | as they are | later tokens more |
| ``second-pass`` | each document twice | the second reading |
| ``recall`` | with spans of the past asked for again behind a marker | the text, and what is asked for |
| ``adapt`` | parts of several documents, the state going on | the last part of each |

They are for training. Evaluation is the same for all: bits per byte of held-out text, unchanged and unweighted.
"""
