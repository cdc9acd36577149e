"""Commands around training: test matrix, report."""
