import pytest
from colours import make_ledger


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """A ledger with three requests; undoing the first is prepared. Tests work on copies (`colours.copied`)."""
    return make_ledger(tmp_path_factory.mktemp("ledger") / "three", undoable=["red"])
