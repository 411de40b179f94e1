from imgtune_jax import info
from imgtune_jax.evals.results import make_result, newest_results


def test_results_are_the_newest_ones_without_metrics_per_class(caplog):
    fields = dict(dataset="zs", model="m", pretrained="", task="zeroshot_classification")
    new = {"acc1": 0.5, "loss": float("nan")} | {f"per_class/f1/c{i}": 0.5 for i in range(200)}
    results = [
        make_result(**fields, metrics=new, step=30),
        make_result(**fields, metrics={"acc1": 0.25}, step=10),
    ]
    lines = list(info._result_lines(newest_results(results)))
    assert lines == ["zs (m): acc1 0.5, loss not finite"]
