"""Something happens to a run in the middle of training."""


def at_batch(run, number, act):
    """Call `act` as micro-batch `number` (from 1) of the run is about to be trained on."""
    original, seen = run.augment, 0

    def counting(*batch):
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return original(*batch)

    run.augment = counting
