"""A text and the options of a run that takes a second, for tests of the command line."""

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 30
SMALL = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --max-steps 6 --eval-interval 3".split()
SMALL += "--eval-batches 1 --log-interval 3 --device cpu".split()
