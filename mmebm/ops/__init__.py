"""The ops: what a backend must compute. One folder per op, one file in it per implementation."""
