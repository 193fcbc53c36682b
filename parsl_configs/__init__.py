"""Sites: values only, one file each."""
