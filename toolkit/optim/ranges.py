"""Ranges of hyper-parameters that all our optimizers have."""


def check_ranges(betas: tuple[float, ...] = (), **at_least_0: float) -> None:
    """Raise ValueError for a hyper-parameter outside its range."""
    for name, value in at_least_0.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}]={beta} must be in [0, 1)")
