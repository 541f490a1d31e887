"""The head suite on every backend of this machine. A new backend imports it too, beside a `backend` fixture of its own."""

from tests.head.head_callers import *  # noqa: F403
from tests.head.head_distillation import *  # noqa: F403
from tests.head.head_expectation import *  # noqa: F403
from tests.head.head_relations import *  # noqa: F403
from tests.head.head_several import *  # noqa: F403
from tests.head_suite import *  # noqa: F403
