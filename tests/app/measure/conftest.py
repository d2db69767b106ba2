"""A storage of each kind that needs no server."""

import pytest


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.log"], ids=["sqlite", "journal"])
def storage(request, tmp_path):
    """The address of one that is not there yet."""
    return request.param.format(tmp_path)
