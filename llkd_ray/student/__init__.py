"""The student: model, training, inference; `ray_train` is the glue to Ray Train."""
