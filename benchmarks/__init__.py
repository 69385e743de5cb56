"""Measurements. Importing the package sets how idle threads wait, which must happen before torch is loaded."""

from mutor_img.common.threads import set_spinning

set_spinning()
