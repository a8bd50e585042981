"""The student: model, training, inference; `ray_train` integrates it with Ray Train."""
