"""User code that type checkers must accept; `test_typing.py` runs mypy over it. Never executed."""

import asyncio
from typing import assert_type

import numpy as np
from latentd_client import (
    Accepted,
    AsyncClient,
    Client,
    Decoded,
    Encoded,
    FieldsInvalid,
    LatentdError,
    LoopStep,
    Model,
    Overloaded,
    Preview,
    Retries,
    Samples,
    Scores,
    Step,
    Violation,
)


def blocking() -> None:
    """Every method of the synchronous client."""
    with Client("localhost:8500", timeout=5.0, retries=Retries(max_attempts=3), caller="me") as client:
        samples = client.sample("digits-vae", 4, seed=1, label=[1, 2, 3, 4], dtype=np.uint8)
        assert_type(samples, Samples)
        assert_type(samples.reproduce(client), Samples)
        assert_type(samples.seed, int)
        samples.save("a.png", columns=2)

        for event in client.sample_stream("digits-diffusion", previews=5, steps=50):
            if isinstance(event, Accepted):
                assert_type(event.determinism_class, str)
            elif isinstance(event, Preview):
                assert_type(event.completed_steps, int)
            else:
                assert_type(event, Samples)

        encoded = client.encode("digits-vae", samples.array)
        assert_type(encoded, Encoded)
        assert_type(client.decode("digits-vae", encoded.latents, output="draw"), Decoded)
        assert_type(client.score("digits-vae", samples.array), Scores)
        assert_type(client.interpolate("digits-vae", 1, 2, label=3), Decoded)
        assert_type(client.denoise_step("digits-diffusion", np.zeros((1, 1, 8, 8)), 999, 500), Step)
        assert_type(client.models(), list[Model])
        assert_type(client.model("digits-vae").value_range, tuple[float, float])

        with client.denoise_loop("digits-diffusion", 2, steps=10) as loop:
            for step in loop:
                assert_type(step, LoopStep)
                loop.override(next_timestep=3, state=step.denoised)


async def concurrent() -> None:
    """Every method of the asynchronous client."""
    async with AsyncClient("localhost:8500") as client:
        samples = await client.sample("digits-vae", 4)
        assert_type(samples, Samples)
        assert_type(await samples.reproduce(client), Samples)
        async for event in client.sample_stream("digits-diffusion"):
            assert_type(event, Accepted | Preview | Samples)
        assert_type(await client.encode("digits-vae", samples.array), Encoded)
        assert_type(await client.decode("digits-vae", [[0.0] * 8]), Decoded)
        assert_type(await client.models(), list[Model])
        async with client.denoise_loop("digits-diffusion") as loop:
            async for step in loop:
                assert_type(step, LoopStep)


def failing(client: Client) -> tuple[Violation, ...]:
    """Errors are typed too."""
    try:
        client.models()
    except FieldsInvalid as error:
        return error.violations
    except Overloaded as error:
        assert_type(error.retry_after_s, float | None)
    except LatentdError as error:
        assert_type(error.request_id, str | None)
    return ()


def wrong(client: Client) -> None:
    """What a type checker must catch; an unused ignore would fail the check."""
    client.sample("digits-vae", sed=1)  # type: ignore[call-arg]  # a misspelt option
    client.sample("digits-vae", output="mode")  # type: ignore[arg-type]  # neither mean nor draw
    client.encode("digits-vae")  # type: ignore[call-arg]  # samples are required
    client.sample("digits-vae").labels.sum()  # type: ignore[union-attr]  # a model may have no classes


if __name__ == "__main__":
    asyncio.run(concurrent())
