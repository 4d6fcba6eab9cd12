"""Both views of a thorax phantom by this projector and by others: forward, forward and backward to the volume, memory.

DiffDRR (siddon; trilinear with as many points as voxels, and its default 500) and nanodrr (500) cast rays one volume at
a time, so that a batch is a loop. Their rays are prepared beforehand, as ours are. `difference`: relative L2 of both
images to ours. `limit`: the time to read the volume once per view at this machine's measured copy speed, over ours.
Growth of memory is that of one call in volumes, the volume itself not counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffdrr.renderers import Siddon, Trilinear
from nanodrr.data import Subject
from nanodrr.drr import DRR
from torch import Tensor

from app.data.phantom import phantom_hu
from app.physics.attenuation import hu_to_mu
from app.physics.geometry import DETECTOR_MARGIN, PRESETS_MM, VIEWS, Geometry
from app.physics.projector import Projector
from app.physics.sart import sart
from tests.bench.measure import growth_bytes, in_turn, machine, parser, save, table
from tests.rays import CAMERA_TO_PATIENT, diffdrr_rays

FIELD_OF_VIEW_MM = 384.0
DEFAULT_POINTS = 500
Images = Callable[[Tensor], Tensor]
"""(B, 1, D, H, W) attenuation -> (B, 2, Nv, Nu) line integrals."""


def main() -> None:
    """Prints a table per size and batch, writes JSON."""
    made = parser("projector", __doc__, 5)
    made.add_argument("--edges", type=int, nargs="+", default=[64, 128, 256], help="voxels (64 128 256)")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="volumes at a time (1 8)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--patience", type=float, default=20.0, metavar="S", help="for all calls of one way (20)")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine())
    rows: list[dict[str, Any]] = []
    for edge in arguments.edges:
        for batch in arguments.batches:
            found = compare(edge, batch, device, arguments.repeats, arguments.patience)
            rows += found
            print(f"\n{edge}^3, batch {batch}\n{shown(found)}", flush=True)
            save({"rows": rows}, arguments.json)


def compare(edge: int, batch: int, device: torch.device, repeats: int, patience_s: float) -> list[dict[str, Any]]:
    """A row per way; ours is the first, a sweep of SART the last."""
    geometry = thorax_geometry()
    mu = thorax(edge, device).repeat(batch, 1, 1, 1, 1)
    projector = Projector(geometry, edge).to(device)
    ways: dict[str, Images] = {
        "this project": projector,
        "DiffDRR siddon": one_by_one(diffdrr(geometry, edge, device, None)),
        f"DiffDRR trilinear, {edge}": one_by_one(diffdrr(geometry, edge, device, edge)),
        f"DiffDRR trilinear, {DEFAULT_POINTS}": one_by_one(diffdrr(geometry, edge, device, DEFAULT_POINTS)),
        f"nanodrr, {DEFAULT_POINTS}": one_by_one(nanodrr(geometry, edge, device)),
    }
    with torch.no_grad():
        ours = projector(mu[:1])
        differences = {name: float((way(mu[:1]) - ours).norm() / ours.norm()) for name, way in ways.items()}
        forward = in_turn({name: lambda way=way: way(mu) for name, way in ways.items()}, repeats, patience_s)
        copied = in_turn({"copy": mu.clone}, repeats)["copy"].median / 2  # a copy reads and writes
        sweep = in_turn({"sweep": lambda: sart(mu, projector(mu), projector, 1)}, repeats, patience_s)["sweep"]
        grown = growth_bytes(lambda: projector(mu))
    volume = mu.clone().requires_grad_()
    both = in_turn({name: lambda way=way: gradient(way, volume) for name, way in ways.items()}, repeats, patience_s)
    rows = [
        {
            "edge": edge,
            "batch": batch,
            "way": name,
            "forward": forward[name],
            "both": both[name],
            "forward_ratio": forward[name].median / forward["this project"].median,
            "both_ratio": both[name].median / both["this project"].median,
            "difference": differences[name],
        }
        for name in ways
    ]
    rows[0] |= {
        "grown_volumes": grown / (mu.numel() * mu.element_size()),
        "limit": len(VIEWS) * copied / forward["this project"].median,
    }
    return [*rows, {"edge": edge, "batch": batch, "way": "a sweep of SART (with p)", "forward": sweep}]


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """As a table for people."""
    lines = [
        [
            row["way"],
            row["forward"].cell(),
            f"{row['forward_ratio']:.1f}" if "forward_ratio" in row else "",
            row["both"].cell() if "both" in row else "",
            f"{row['both_ratio']:.1f}" if "both_ratio" in row else "",
            f"{100 * row['difference']:.3f} %" if "difference" in row else "",
            f"{row['grown_volumes']:.2f}" if "grown_volumes" in row else "",
            f"{row['limit']:.2f}" if "limit" in row else "",
        ]
        for row in rows
    ]
    columns = ("", "forward ms", "times ours", "and backward ms", "times ours", "difference", "volumes", "limit")
    return table(columns, lines)


def thorax_geometry() -> Geometry:
    """A chest stand."""
    sdd, sod = PRESETS_MM["chest_stand"]
    return Geometry(sdd, sod, FIELD_OF_VIEW_MM, DETECTOR_MARGIN * FIELD_OF_VIEW_MM * sdd / sod)


def thorax(edge: int, device: torch.device) -> Tensor:
    """Attenuation (1, 1, D, H, W) in 1/mm of a phantom in air: renderers differ in what lies beyond the last voxel."""
    hu = torch.from_numpy(phantom_hu(0, 0, edge, FIELD_OF_VIEW_MM)).float()
    inside = torch.zeros_like(hu, dtype=torch.bool)
    margin = edge // 16
    inside[margin:-margin, margin:-margin, margin:-margin] = True
    return torch.where(inside, hu_to_mu(hu), 0.0)[None, None].to(device)


def gradient(way: Images, volume: Tensor) -> None:
    """Forward, and back to the volume."""
    volume.grad = None
    way(volume).square().sum().backward()  # type: ignore[no-untyped-call]


def one_by_one(image: Images) -> Images:
    """A batch by a renderer of single volumes."""
    return lambda mu: torch.cat([image(mu[index : index + 1]) for index in range(len(mu))])


def diffdrr(geometry: Geometry, edge: int, device: torch.device, points: int | None) -> Images:
    """DiffDRR's trilinear renderer with so many points per ray; siddon without."""
    renderer = Siddon() if points is None else Trilinear()
    views = [diffdrr_rays(geometry, edge, view).to(device) for view in VIEWS]

    def image(mu: Tensor) -> Tensor:
        density = mu[0, 0].permute(2, 1, 0)
        options = [{} if points is None else {"n_points": points, **rays.depths} for rays in views]
        images = [rays.render(renderer, density, **more) for rays, more in zip(views, options, strict=True)]
        return torch.stack(images).view(1, len(VIEWS), edge, edge).flip(2)

    return image


def nanodrr(geometry: Geometry, edge: int, device: torch.device) -> Images:
    """nanodrr, whose images have rows along the camera's y: they rise as ours do."""
    voxel_mm, pixel_mm = geometry.field_of_view_mm / edge, geometry.detector_mm / edge
    to_world = torch.eye(4) * voxel_mm
    to_world[:3, 3] = -voxel_mm * (edge - 1) / 2
    to_world[3, 3] = 1.0
    to_grid = torch.eye(4) * (2 / edge)
    to_grid[:3, 3] = 1 / edge - 1
    to_grid[3, 3] = 1.0
    nothing = torch.zeros(1, 1, edge, edge, edge)
    subject = Subject(
        nothing, nothing, to_world, torch.linalg.inv(to_world), to_grid, torch.zeros(3), convert_to_mu=False
    ).to(device)
    camera = DRR.from_carm_intrinsics(
        geometry.source_to_detector_mm, pixel_mm, pixel_mm, 0.0, 0.0, edge, edge, dtype=torch.float32, device=device
    )
    poses = []
    for view in VIEWS:
        pose = torch.eye(4)
        pose[:3, :3] = torch.tensor(CAMERA_TO_PATIENT[view])
        pose[:3, 3] = -geometry.source_to_isocenter_mm * pose[:3, 2]
        poses.append(pose[None].to(device))

    def image(mu: Tensor) -> Tensor:
        subject._image_hu = mu
        return torch.cat([camera(subject, pose, n_samples=DEFAULT_POINTS) for pose in poses], dim=1)

    return image


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="nanodrr|torchio")
    main()
