"""What evaluations and optimisers raise."""


class NonFiniteError(FloatingPointError):
    """Loss, derivative or data is NaN or infinite; the parameters of an optimiser are those of the last good step."""
