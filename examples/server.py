"""Serve a trained model over HTTP: generated text arrives piece by piece.

    python examples/server.py tiny-shakespeare --port 8000
    curl -N 'http://localhost:8000/generate?prompt=ROMEO:&length=300&temperature=0.7&seed=1'

Each request runs in a thread. All share one model, which no call changes.
"""

import argparse
import logging

import fastapi
import uvicorn
from fastapi.responses import StreamingResponse

import lstm_jax
from lstm_jax.run import command


def make_app(run: lstm_jax.Run) -> fastapi.FastAPI:
    """Return an application that generates text with a model."""
    app = fastapi.FastAPI(title=repr(run))

    @app.get("/generate")
    def generate(
        prompt: str = "",
        length: int = fastapi.Query(500, ge=1, le=10_000),
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> StreamingResponse:
        """Stream the continuation of a prompt."""
        try:
            pieces = run.stream(
                prompt, length=length, temperature=temperature, top_p=top_p, seed=seed
            )
        except lstm_jax.UserError as error:  # Such as a temperature that is not allowed.
            raise fastapi.HTTPException(400, str(error)) from None
        # Starlette takes each piece from the generator in a thread of its pool.
        encoded = (piece.encode("utf-8", "surrogateescape") for piece in pieces)
        return StreamingResponse(encoded, media_type="text/plain; charset=utf-8")

    return app


def main() -> None:
    """Serve a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model that lstm_jax.load reads")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    logging.getLogger("lstm_jax").setLevel(logging.ERROR)  # No warning for each prompt.
    model = lstm_jax.load(arguments.model)
    list(model.stream(length=1))  # Compiles before the first request.
    uvicorn.run(make_app(model), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    command.call_main(main)
