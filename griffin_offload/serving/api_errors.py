"""What a client is told when it gets no answer: OpenAI's error form and a status."""

from typing import Any


class ApiError(Exception):
    """A request that ends here. `param` names the field that is wrong, `code` says what is, for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """OpenAI's word for errors of this status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def to_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A body that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, reason: str) -> ApiError:
    """A field that this server knows and does not serve."""
    return ApiError(400, f"{param} is not supported here: {reason}", param=param, code="unsupported_parameter")


# Clients of OpenAI's try 408 and 5xx again unless told not to; the same work would only take as long again.
NO_RETRY = {"x-should-retry": "false"}


def out_of_time(seconds: float) -> ApiError:
    return ApiError(
        408, f"no complete answer within {seconds:g} s: ask for fewer tokens", code="timeout", headers=NO_RETRY
    )


def slow_body(seconds: float) -> ApiError:
    return ApiError(408, f"the body did not come within {seconds:g} s", code="timeout", headers=NO_RETRY)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def too_many_connections() -> ApiError:
    """The connection is closed behind this, so that the next try is a new one."""
    return ApiError(
        503,
        "too many connections are open: try again in 1 s",
        code="too_many_connections",
        headers={"retry-after": "1", "connection": "close"},
    )


def changed() -> ApiError:
    """Files of the model are not what they were. What changed is for the log: paths are nothing for clients."""
    return ApiError(
        503, "the model's files were changed while it was loaded; it is loaded again now", code="model_unavailable"
    )


def out_of_memory() -> ApiError:
    return ApiError(503, "the server is out of memory for this request: ask for less", code="out_of_memory")


def limit(message: str) -> ApiError:
    """The machine may have no more files or threads: another moment may."""
    return ApiError(503, message, code="limit_reached")


def not_finite(message: str) -> ApiError:
    """The model's own numbers: the same request would fail again."""
    return ApiError(500, message, code="not_finite", headers=NO_RETRY)


def broken() -> ApiError:
    """A bug of ours, or a machine in trouble: the details are for the log."""
    return ApiError(
        500, "the request failed inside the server; its log says more", code="internal_error", headers=NO_RETRY
    )
