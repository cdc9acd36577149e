"""What a run costs in memory: readings (sources), owners (ledger), arithmetic (predict), all ranks (report)."""
