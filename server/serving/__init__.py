"""A model as a service: pictures over HTTP in the shape of OpenAI's images API. Start at `server.serving.app`."""
