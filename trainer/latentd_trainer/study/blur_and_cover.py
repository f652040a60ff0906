"""Digits by a VAE, a GAN and both in one: who blurs, who covers.

Precision and recall: Kynkaanniemi et al., arXiv 1904.06991. Density and coverage: Naeem et al., arXiv 2002.09797.
"""

from __future__ import annotations

from latentd_trainer.report import figure_text, table
from latentd_trainer.served import draw_variants
from latentd_trainer.study import digit_pictures
from latentd_trainer.study.digit_models import MEASURES, METHOD, Digits, Sampled
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

SHARP = 0.95
"""Of real images' sharpness: below this an image counts as blurred."""
COVERED = 0.95
"""Of the recall that real images have: below this, shapes are missed."""

_NAMES = {"vae": "VAE", "gan": "GAN", "vae_gan": "VAE-GAN"}


def study(settings: Settings) -> Section:
    """Measure each way in which each of the three draws."""
    digits = Digits(settings)
    drawn: dict[str, Sampled] = {}
    for family, title in _NAMES.items():
        graphs = digits.graphs(family)
        asked = digits.labels(graphs)
        settings.tell(f"{family}, samples")
        for each in draw_variants(graphs, asked, settings.seed):
            way = f", {each.description}" if each.variant else ""
            drawn[f"{family.replace('_', '-')}{each.variant}"] = Sampled(f"{title}{way}", each.images, asked)
    measured = {"real": digits.measure_real()} | {name: digits.measure(each) for name, each in drawn.items()}
    for found in measured.values():
        found["relative-recall"] = found["recall"] / measured["real"]["recall"]
    names = {"real": "*real images*"} | {name: each.description for name, each in drawn.items()}
    return Section(
        title="VAEs blur and cover, GANs sharpen and miss",
        claim="A VAE maximises a bound on the likelihood, so it covers the data and blurs; a GAN's generator is led to "
        "where the data are dense, so its samples are sharp and miss modes. Joined, they have the better of both "
        "(Larsen et al., arXiv 1512.09300).",
        measured=f"{METHOD} A VAE is read twice: the mean of p(x | z, y), which is what is usually shown, and a "
        "draw from it. The VAE-GAN is that VAE with its decoder tuned against a discriminator.",
        figures={f"{name}/{measure}": value for name, found in measured.items() for measure, value in found.items()},
        criteria=(
            Criterion("A VAE's means are blurred", "vae-mean/sharpness", "<", SHARP),
            Criterion("A GAN's samples are not", "gan/sharpness", ">=", SHARP),
            Criterion(
                "A VAE's means cover the data (recall over that of real images)",
                "vae-mean/relative-recall",
                ">=",
                COVERED,
            ),
            Criterion("A VAE's draws cover the data", "vae-draw/relative-recall", ">=", COVERED),
            Criterion("A GAN misses shapes", "gan/relative-recall", "<", COVERED),
            Criterion("A GAN covers less than the VAE's means", "gan/recall", "<", "vae-mean/recall"),
            Criterion(
                "A VAE-GAN's means are sharper than the VAE's", "vae-gan-mean/sharpness", ">", "vae-mean/sharpness"
            ),
            Criterion("and cover more", "vae-gan-mean/recall", ">", "vae-mean/recall"),
        ),
        body="\n\n".join(
            [
                *digits.taken(),
                table(
                    ["", *MEASURES],
                    [
                        [names[name], *(figure_text(found[each]) for each in MEASURES)]
                        for name, found in measured.items()
                    ],
                ),
                "A mean averages over all that z does not say, which is why it blurs; a draw shows the distribution, "
                "with the noise of its pixels. So a claim must say which of the two it means. Classes are given here, "
                "ten of them, so that no model can miss one; the ring of eight normals shows what happens without.",
            ]
        ),
        pictures=(
            Picture(
                "blur-and-cover-samples.png",
                "Held-out images and samples, a row a class; first ones first.",
                digit_pictures.samples(digits.picture_rows(drawn.values())),
            ),
            Picture(
                "blur-and-cover.png",
                "Left: precision against recall; up and right is better. Right: sharpness, 1 being that of held-out "
                "images.",
                digit_pictures.scatter(measured, names),
            ),
        ),
    )
