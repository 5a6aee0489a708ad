"""No test reads or writes the costs that this user has measured."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_cached_costs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
