"""Makes best_model.pth: training, distillation and calibration. Nothing in the root imports it."""
