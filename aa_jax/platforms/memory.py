"""How the C library manages the memory of the process."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation; for every library in the process.

    By default it maps each large array afresh and gives it back when freed. XLA's CPU backend
    allocates its temporaries anew on every call, so each step would touch fresh pages, and the page
    faults can take longer than the arithmetic. One arena for all threads, because what a worker
    thread's own arena cannot hold is mapped afresh as well. The price: the process keeps its
    largest size.

    Returns:
      False, and nothing is changed, where the C library is another one or the user has set
      ``MALLOC_*`` or ``GLIBC_TUNABLES``.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return False
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {_ARENA_MAX: 1, _TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # -1: never
    return all([library.mallopt(name, value) == 1 for name, value in settings.items()])
