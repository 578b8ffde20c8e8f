"""The command line: ``mmebm train | sample | evaluate | backends``."""
