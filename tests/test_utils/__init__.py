"The behaviours of MMDetection's tests of utilities, in visdet's words"
