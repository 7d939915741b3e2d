"""Every error that a person or another machine can cause, with its next step and its exit code.

    FedCanvasError              1   never raised itself
    |- UsageError               2   the command line is wrong: option, argument, combination
    |- ConfigError              3   a setting is unknown, of the wrong type, or out of bounds
    |- DataError                4   images, captions or prompts cannot be used
    |- PrivacyError             5   the privacy that was asked for cannot be had
    |  |- BudgetExhausted       5   the next release would pass the budget
    |  `- LedgerError           5   a ledger is damaged, behind its anchor, in use, or cannot be written
    |- ProtocolError            6   a message of a round is malformed, oversize, or of another version
    |- FederationError          7   a site or an engine failed; the run stops
    |- RunDirectoryError        8   a run or model folder is missing, incomplete or in use
    |- PromptError              9   a prompt is empty, too long, or cannot be encoded
    `- TrustError              10   a key, signature, certificate or sealed message is not what may be trusted
       `- BundleError          10   a released model was altered, is not whole, or its evidence does not hold

Exit code 0 is success, 130 an interruption by Ctrl-C. The codes are stable: scripts rely on them.
Not here: invariants that only a bug can break; those are `assert`.
"""

from __future__ import annotations


class FedCanvasError(Exception):
    """A fact, in lower case and without a full stop, and the next step as `hint`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing pickle errors; without this the hint is lost on the way.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[FedCanvasError], message: str, hint: str | None) -> FedCanvasError:
    return kind(message, hint=hint)


class UsageError(FedCanvasError):
    exit_code = 2


class ConfigError(FedCanvasError):
    exit_code = 3


class DataError(FedCanvasError):
    exit_code = 4


class PrivacyError(FedCanvasError):
    exit_code = 5


class BudgetExhausted(PrivacyError):
    pass


class LedgerError(PrivacyError):
    pass


class ProtocolError(FedCanvasError):
    exit_code = 6


class FederationError(FedCanvasError):
    exit_code = 7


class RunDirectoryError(FedCanvasError):
    exit_code = 8


class PromptError(FedCanvasError):
    exit_code = 9


class TrustError(FedCanvasError):
    exit_code = 10


class BundleError(TrustError):
    pass
