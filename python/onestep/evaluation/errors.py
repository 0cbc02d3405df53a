"""What an optimiser raises."""


class NonFiniteError(FloatingPointError):
    """The loss, its gradient or the data is NaN or infinite; the parameters are those of the last good step."""
