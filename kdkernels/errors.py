"""What is wrong with something that a user gave."""


class InputError(ValueError):
    """What the user gave (a recipe, a data file, a run directory) cannot be used; the message says where, what was
    expected, what came.
    """


class MissingPackage(ImportError):
    """A package that an extra of kdkernels asks for is not installed: the message says what to install."""


class ServerError(Exception):
    """A server did not do what it was asked for, however often: the message names it, what it was asked, what came and
    the way out.
    """
