"""The entry point by which pytest finds the hooks of emissary_coverage. Every Python that pytest has must read this."""

try:  # noqa: SIM105  # as sitecustomize.py
    from emissary_coverage import (  # type: ignore[import-not-found]  # noqa: F401
        pytest_configure,
        pytest_runtest_logstart,
        pytest_sessionfinish,
    )
except Exception:  # noqa: BLE001  # an old Python: nothing is covered
    pass
