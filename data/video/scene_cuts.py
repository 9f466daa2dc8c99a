"""Where the scenes of a clip change, by FFmpeg's measure."""

from pathlib import Path

import av

from data.video.container import clip_name, decode_frames, open_clip, video_stream


def scene_cuts(source: Path | bytes, threshold: float = 0.3) -> list[float]:
    """When new scenes begin, in seconds from the clip's first frame, ascending; empty for a clip of one scene.

    The measure is that of FFmpeg's `select='gt(scene,0.3)'`. It is the smaller of two values: the mean difference
    between a frame and the one before it, and the change of that difference. A pan scores low, because its difference
    stays constant.

    Args:
        source: a file, or a file's bytes; the whole clip is decoded.
        threshold: score above which a frame begins a scene, 0 to 1.

    Raises:
        ValueError: if the clip cannot be decoded, or the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"got threshold {threshold}; expected a number between 0 and 1, such as 0.3.")
    with open_clip(source) as container:
        graph = _filter_graph(video_stream(container), threshold)
        first: float | None = None
        cuts: list[float] = []
        for frame in decode_frames(container):
            if frame.pts is None:
                raise ValueError(f"{clip_name(source)} does not tell when its frames are shown; convert it to mp4.")
            first = frame.time if first is None else first
            graph.vpush(frame)
            cuts += _selected_times(graph)
        graph.vpush(None)
        cuts += _selected_times(graph)
    return [time - (first or 0.0) for time in cuts]


def _filter_graph(stream: av.VideoStream, threshold: float) -> av.filter.Graph:
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(template=stream),
        graph.add("format", "yuv420p"),  # frames of 10 bits are scored as 8
        graph.add("select", f"gt(scene,{threshold})"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes)
    graph.configure()
    return graph


def _selected_times(graph: av.filter.Graph) -> list[float]:
    times = []
    while True:
        try:
            times.append(graph.vpull().time)
        except (av.error.BlockingIOError, av.error.EOFError):
            return times
