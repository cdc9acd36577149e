"""Pruning by question: when (schedule), how good (scores), which (select), where (mask, packing), by whom (hooks)."""
