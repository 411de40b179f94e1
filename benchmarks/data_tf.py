"""tf.data's side of data.py, for an interpreter that has TensorFlow; started by it.

The operations are big_vision's: decode_jpeg_and_inception_crop, then flip_lr. What is done with the
window that was decoded is "resize", "antialias" (resize so) or "nothing".
"""

import pickle
import sys
import time
from pathlib import Path

import tensorflow as tf

BUFFERED = 2  # batches


def augment(encoded: tf.Tensor, size: int, then: str) -> tf.Tensor:
    """The window that is drawn is all that is decoded."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(encoded),
        tf.zeros([0, 0, 4], tf.float32),
        area_range=(0.08, 1.0),
        aspect_ratio_range=(0.75, 1.33),
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], extent[:2]], axis=0)
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
    if then == "nothing":
        return image[:1, :1]  # batches are of one shape
    image = tf.image.resize(image, (size, size), method="bilinear", antialias=then == "antialias")
    return tf.image.random_flip_left_right(tf.cast(image, tf.uint8))


def main() -> None:
    """Answer each line, a number of batches, with the seconds that they took."""
    path, size, batch_size, threads, then = sys.argv[1:]
    dataset = tf.data.Dataset.from_tensor_slices(pickle.loads(Path(path).read_bytes()))
    dataset = dataset.repeat().map(
        lambda x: augment(x, int(size), then), num_parallel_calls=int(threads)
    )
    dataset = dataset.batch(int(batch_size)).prefetch(BUFFERED)
    options = tf.data.Options()
    options.threading.private_threadpool_size = int(threads)
    batches = iter(dataset.with_options(options).as_numpy_iterator())
    for line in sys.stdin:
        for _ in range(BUFFERED + 2):
            next(batches)
        began = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
