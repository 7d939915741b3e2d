"""Limits of a service: how much it takes, how long it waits, how much it holds.

Every wait has an end and everything that is held has a bound, so that no client can stop the service or fill its
memory. Not here: what a request may ask for (`server.serving.request`), and where the service listens
(`server.serving.listener`).
"""

from __future__ import annotations

from pydantic import Field

from shared.config import Section


class ServingSettings(Section):
    """One unit is a picture of at most 256 x 256 pixels; a larger one counts by its area."""

    most_units: int = Field(1024, ge=1, le=2**20, description="Units asked for and not yet sent; more get a 429.")
    most_texts: int = Field(512, ge=1, le=2**16, description="Waiting to be described; more get a 429.")
    most_connections: int = Field(2000, ge=1, le=2**16, description="Open at once; a request on more gets a 429.")
    most_body_bytes: int = Field(2**16, ge=2**10, le=2**24, description="Of a request.")
    head_seconds: float = Field(20.0, gt=0, le=3600, description="For a client to send a whole request head.")
    body_seconds: float = Field(20.0, gt=0, le=3600, description="For a client to send a whole body.")
    drawing_seconds: float = Field(60.0, gt=0, le=3600, description="From a request's body to its pictures.")
    sending_seconds: float = Field(60.0, gt=0, le=3600, description="That a client may take nothing of an answer.")
    least_sending_rate: int = Field(
        2**13, ge=1, le=2**40, description="Bytes a second that a client has to take on average, after sending_seconds."
    )
    keep_alive_seconds: int = Field(15, ge=1, le=3600, description="Between two requests of a connection.")
    ending_seconds: int = Field(15, ge=1, le=3600, description="For work under way when the service is stopped.")
    gallery_bytes: int = Field(
        2**26, ge=2**20, le=2**34, description="Of pictures kept for a URL, oldest go first; and of those being sent."
    )
    gallery_seconds: float = Field(3600.0, gt=0, le=30 * 86400, description="That a picture is kept for its URL.")
    hosts: tuple[str, ...] | None = Field(
        None, description="Names by which clients may call it; none of them given: any. A page elsewhere cannot pose."
    )
    log_prompts: bool = Field(False, description="Whether prompts stand in the log. They may be personal.")
