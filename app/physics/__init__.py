"""X-ray physics: attenuation in 1/mm, cone-beam geometry in mm, projector, SART. Linear and in fp32 throughout."""
