"""Compiler options for XLA:CPU. The tests of its products and convolutions are in tests/models."""

import jax

from imgtune_jax import config, xla_cpu
from imgtune_jax.partition import make_mesh


def test_several_cpu_devices_run_collectives_in_one_order():
    def options(devices):
        mesh = make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1), devices)
        return xla_cpu.compiler_options(mesh)

    one_order = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    assert options(jax.devices()) == one_order
    assert options(jax.devices()[:1]) == {}
    jax.jit(lambda x: x + 1, compiler_options=one_order)(1.0)  # XLA rejects unknown option names
