"""The frozen diffusion model: loaded through ComfyUI, a differentiable velocity function, one denoising loop, one noise schedule."""
