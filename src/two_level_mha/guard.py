"""guard: whatever ends a block of code on one rank, every rank of the mesh hears of it."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

from torch.distributed.device_mesh import DeviceMesh

from two_level_mha.errors import GridError, RankFailure
from two_level_mha.failures import is_of_an_exchange
from two_level_mha.mesh import place_on

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def guard(mesh: DeviceMesh, *, end_with_parent: bool = False) -> Iterator[None]:
    """A context around the code that every rank runs, the training loop for instance.

    An exchange that fails in it, in forward or backward and in torch's own parallel layers too, raises RankFailure. An
    exception of another kind leaves the block as it is; the other ranks' next exchange with this one then raises
    RankFailure at once, with the exception's text, and the mesh is closed on all: nobody waits for a rank that left.
    A GridError, which is the same on every rank, closes nothing.

    end_with_parent: from now on this process gets SIGTERM when its parent dies (Linux), torchrun for instance, whose
    ranks would train on without it. Raises GridError for what is no mesh, and where end_with_parent is not available.
    """
    place = place_on(mesh)
    if end_with_parent:
        _end_with_parent()
    if place.control is None:
        yield
        return
    control = place.control
    try:
        yield
        control.deferred.look()
    except (RankFailure, GridError):
        raise
    except Exception as error:
        if is_of_an_exchange(error):
            raise control.failure(str(error)) from error
        control.leave(error)
        raise


def _end_with_parent() -> None:
    if sys.platform != "linux":
        raise GridError(f"end_with_parent needs Linux, this is {sys.platform}: leave it out")
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it was asked for
        os.kill(os.getpid(), signal.SIGTERM)
