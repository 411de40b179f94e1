"""The tf.data variants of data.py, which starts this script in an interpreter with TensorFlow.

The operations are those of big_vision's decode_jpeg_and_inception_crop and flip_lr. The argument
`resizing` selects what happens to the decoded crop: "resize" it, resize it with "antialias", or
"none", which drops it.
"""

import pickle
import sys
import time
from pathlib import Path

import tensorflow as tf

NUM_PREFETCHED = 2  # batches


def augment(encoded: tf.Tensor, size: int, resizing: str) -> tf.Tensor:
    """Sample a crop of a JPEG, decode only the crop, resize it and flip it at random."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(encoded),
        tf.zeros([0, 0, 4], tf.float32),
        area_range=(0.08, 1.0),
        aspect_ratio_range=(0.75, 1.33),
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    crop = tf.concat([begin[:2], extent[:2]], axis=0)
    image = tf.image.decode_and_crop_jpeg(encoded, crop, channels=3)
    if resizing == "none":
        return image[:1, :1]  # one pixel, so that all images of a batch have the same shape
    image = tf.image.resize(
        image, (size, size), method="bilinear", antialias=resizing == "antialias"
    )
    return tf.image.random_flip_left_right(tf.cast(image, tf.uint8))


def main() -> None:
    """Read numbers of batches from standard input, and print the seconds that each takes."""
    path, size, batch_size, threads, resizing = sys.argv[1:]
    dataset = tf.data.Dataset.from_tensor_slices(pickle.loads(Path(path).read_bytes()))
    dataset = dataset.repeat().map(
        lambda x: augment(x, int(size), resizing), num_parallel_calls=int(threads)
    )
    dataset = dataset.batch(int(batch_size)).prefetch(NUM_PREFETCHED)
    options = tf.data.Options()
    options.threading.private_threadpool_size = int(threads)
    batches = iter(dataset.with_options(options).as_numpy_iterator())
    for line in sys.stdin:
        for _ in range(NUM_PREFETCHED + 2):
            next(batches)
        start = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
