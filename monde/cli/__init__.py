"""The command line: `monde generate`, `monde bench`, `monde info`. Start reading in main.py."""
