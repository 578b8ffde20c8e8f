"""The ops: what a backend must compute. One file per op: schema, validation and the choice of a backend."""
