"""The diffusion model of one stage: X-ray encoder, lifting, hybrid CNN + ViT backbone, conditioning, sampler."""
