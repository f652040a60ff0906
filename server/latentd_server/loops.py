"""Client-driven denoising loops: the caller decides when to step and where to, the server keeps the state. Pure.

A loop that follows its schedule evaluates the very rows that Sample would, so both give the same bytes.
"""

from dataclasses import replace

from latentd.v1 import generation_service_pb2

from latentd_server import samplers
from latentd_server.fields import Fields
from latentd_server.job import Array, Start, StepJob
from latentd_server.options import Walk
from latentd_server.plans import Loop, LoopPosition, LoopStep, Sampling
from latentd_server.schedules import CLEAN
from latentd_server.wiring import Wiring


def opened(plan: Sampling, walk: Walk, model: Wiring) -> tuple[Loop, LoopPosition]:
    """A loop at its first timestep, from a Sample request as resolved."""
    if not isinstance(plan.job, StepJob) or model.schedule is None:
        raise TypeError(f"{model.name} is no diffusion model")
    loop = Loop(plan, model.schedule, walk.sampler, walk.eta, model.state)
    return loop, LoopPosition(previous=None, current=walk.visited[0], remaining=(*walk.visited[1:], CLEAN))


def take_step(request: generation_service_pb2.TakeStep, loop: Loop, position: LoopPosition) -> LoopStep:
    """Resolve the next step of a loop.

    Raises:
        FieldsInvalidError: lists every violation.
    """
    fields = Fields()
    sampling = loop.job
    following: int | None = position.remaining[0]
    if request.HasField("next_timestep"):
        following = fields.integer(request.next_timestep, "next_timestep", CLEAN, position.current - 1)
    start = sampling.start
    if position.state is not None:
        start = Start(noise_scale=0.0, values=position.state, history=position.history)
    if request.HasField("noisy_samples"):
        count = sampling.lane_count
        states = fields.rows(request.noisy_samples, "noisy_samples", loop.sample, count, is_sample=False)
        if states is not None and len(states) != count:
            fields.reject("noisy_samples.shape", f"must hold {count} samples, as many as the loop; got {len(states)}")
        start = Start(noise_scale=0.0, values=states, history=position.history)
    fields.check()
    assert following is not None
    table = samplers.step_rows(loop.schedule, loop.sampler, position.previous, position.current, following, loop.eta)
    job = replace(
        sampling,
        tables=(table,),
        start=start,
        first_step_index=position.evaluation_count,
        estimates_wanted=True,
        history_wanted=True,
    )
    return LoopStep(job, following, request.state_requested)


def stepped(position: LoopPosition, step: LoopStep, state: Array, history: Array) -> LoopPosition:
    """Where a loop stands after a step that led to `state`."""
    return LoopPosition(
        previous=position.current,
        current=step.following,
        remaining=tuple(timestep for timestep in position.remaining if timestep < step.following),
        evaluation_count=position.evaluation_count + len(step.job.tables[0].timesteps),
        state=state,
        history=history,
    )
