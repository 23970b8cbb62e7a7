"""What is measured (speed, quality, kernels), the models it is measured on, and the pages that show it."""
