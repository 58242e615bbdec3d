# The verbs everyone needs; each script's --help tells more.

# list the verbs
default:
    @just --list

# install what build, tests and demo need
setup *args:
    hack/setup {{args}}

# build everything, the guest's initrd too
build *args:
    hack/build {{args}}

# run tests: unit, kvm, system or all
test *args:
    hack/test {{args}}

# formatting, lints, licences, docs, spelling
lint:
    hack/lint

# feed parsers and devices with what nobody meant to write
fuzz *args:
    hack/fuzz {{args}}

# a pod in a microVM, end to end
demo:
    hack/demo
