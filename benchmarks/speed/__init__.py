"""What benchmarks/run.py measures: a file per piece, with CASES, {name: function from a device to a measure.Case}."""
