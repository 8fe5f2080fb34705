r"""BibTeX of papers that several learners rely on, beside those of the learners themselves."""

from ..solvers.mmps import Mmps

__all__ = ["EM", "EM_DPS", "HALF_SCALE", "MUON", "R2R", "TWEEDIE"]

MUON = """@misc{jordan2024muon,
  title = {{Muon}: An Optimizer for Hidden Layers in Neural Networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and
            Cesista, Franz and Newhouse, Laker and Bernstein, Jeremy},
  year = {2024},
  url = {https://kellerjordan.github.io/posts/muon/}
}"""
"""The optimizer of every run."""

R2R = """@inproceedings{pang2021recorrupted,
  title = {Recorrupted-to-Recorrupted: Unsupervised Deep Learning for Image Denoising},
  author = {Pang, Tongyao and Zheng, Huan and Quan, Yuhui and Ji, Hui},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021}
}"""
"""Recorrupted-to-Recorrupted."""

HALF_SCALE = """@misc{scanvic2023scale,
  title = {Scale-Equivariant Imaging: Self-Supervised Learning for Image Super-Resolution and
           Deblurring},
  author = {Scanvic, J{\\'e}r{\\'e}my and Davies, Mike and Abry, Patrice and
            Tachella, Juli{\\'a}n},
  year = {2023},
  eprint = {2312.11232},
  archivePrefix = {arXiv}
}"""
"""Restorations at half scale as examples of sharp images."""

TWEEDIE = """@inproceedings{daras2024consistent,
  title = {Consistent Diffusion Meets {Tweedie}: Training Exact Ambient Diffusion Models with Noisy
           Data},
  author = {Daras, Giannis and Dimakis, Alexandros G. and Daskalakis, Constantinos},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2404.10177},
  archivePrefix = {arXiv}
}"""
"""Ambient score matching: learning from noisy images above their noise level."""

EM = Mmps.citation
"""Expectation maximization of a diffusion prior."""

EM_DPS = """@inproceedings{bai2024expectation,
  title = {An Expectation-Maximization Algorithm for Training Clean Diffusion Models from Corrupted
           Observations},
  author = {Bai, Weimin and Wang, Yifei and Chen, Wenzheng and Sun, He},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2407.01014},
  archivePrefix = {arXiv}
}"""
"""Expectation maximization with DPS as the E-step."""
