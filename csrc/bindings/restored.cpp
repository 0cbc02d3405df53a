// Changes of a user's model for the time of a `with` block, which no interrupt can leave behind.
//
// Python handles signals between bytecodes, so a Ctrl-C may come at the first instruction of an __exit__ written in
// Python, which then puts nothing back; contextlib's generators have the same gap after __enter__. The methods here run
// no bytecode: they are done whole or not at all, and `with` calls __exit__ without looking for signals in between.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace onestep {
namespace {

// Without a GIL two threads may be in these methods at once. With one they take turns by themselves: no method runs
// Python code, but where a class makes a property of `training` (set_mode).
class Lock {
 public:
#ifdef Py_GIL_DISABLED
    Lock() { PyMutex_Lock(&mutex()); }
    ~Lock() { PyMutex_Unlock(&mutex()); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

 private:
    static PyMutex& mutex() {
        static PyMutex shared = {};
        return shared;
    }
#else
    Lock() {}  // not defaulted: a variable of it counts as used
#endif
};

std::vector<py::object> objects_of(const py::list& list) {
    std::vector<py::object> result;
    for (const py::handle item : list) {
        result.push_back(py::reinterpret_borrow<py::object>(item));
    }
    return result;
}

[[noreturn]] void raise() { throw py::error_already_set(); }

// mapping[key] = value for each entry, in order; afterwards what was there before, or no such key.
class Replaced {
 public:
    explicit Replaced(const py::list& entries) {
        for (const py::handle entry : entries) {
            const auto triple = py::reinterpret_borrow<py::tuple>(entry);
            entries_.push_back({triple[0], triple[1], triple[2], {}});
        }
    }

    void enter() {
        const Lock lock;
        for (Entry& entry : entries_) {
            PyObject* before = PyObject_GetItem(entry.mapping.ptr(), entry.key.ptr());
            if (before == nullptr && PyErr_ExceptionMatches(PyExc_KeyError) != 0) {
                PyErr_Clear();
            } else if (before == nullptr) {
                fail();
            }
            entry.before = py::reinterpret_steal<py::object>(before);
            if (PyObject_SetItem(entry.mapping.ptr(), entry.key.ptr(), entry.value.ptr()) != 0) {
                fail();
            }
            ++entered_;
        }
    }

    void exit(const py::args&) {
        const Lock lock;
        undo();
    }

 private:
    struct Entry {
        py::object mapping, key, value, before;
    };

    [[noreturn]] void fail() {
        py::error_already_set error;
        undo();
        throw error;
    }

    void undo() {
        for (; entered_ > 0; --entered_) {
            Entry& entry = entries_[entered_ - 1];
            const int status = entry.before ? PyObject_SetItem(entry.mapping.ptr(), entry.key.ptr(), entry.before.ptr())
                                            : PyObject_DelItem(entry.mapping.ptr(), entry.key.ptr());
            if (status != 0) {
                PyErr_Clear();  // gone already
            }
        }
    }

    std::vector<Entry> entries_;
    size_t entered_ = 0;
};

// The modules that are held in eval mode: the mode that each had before, and which threads hold it, as often as they
// do.
struct Hold {
    py::object before;
    std::vector<unsigned long> threads;
};

std::unordered_map<PyObject*, Hold>& holds() {
    static auto* all = new std::unordered_map<PyObject*, Hold>;  // outlives Python's own end
    return *all;
}

// module.training = mode. A module of torch.nn keeps it in its __dict__; where another class makes a property of it,
// that runs Python code, in which an interrupt may come: it is tried twice.
void set_mode(PyObject* module, PyObject* mode) {
    static PyObject* const name = PyUnicode_InternFromString("training");
    const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!own) {
        PyErr_Clear();
    } else if (PyDict_Contains(own.ptr(), name) == 1) {
        if (PyDict_SetItem(own.ptr(), name, mode) != 0) {
            raise();
        }
        return;
    }
    if (PyObject_SetAttr(module, name, mode) != 0) {
        py::error_already_set error;
        (void)PyObject_SetAttr(module, name, mode);
        PyErr_Clear();
        throw error;
    }
}

// Modules in eval mode; the last thread that leaves puts them back.
class EvalMode {
 public:
    explicit EvalMode(const py::list& modules) : modules_(objects_of(modules)) {}

    void enter() {
        const Lock lock;
        thread_ = PyThread_get_thread_ident();
        for (const py::object& module : modules_) {
            try {
                Hold& hold = holds()[module.ptr()];
                if (!hold.before) {
                    hold.before = module.attr("training");
                }
                hold.threads.push_back(thread_);
                ++entered_;
                set_mode(module.ptr(), Py_False);
            } catch (...) {
                undo();
                throw;
            }
        }
    }

    void exit(const py::args&) {
        const Lock lock;
        undo();
    }

 private:
    // All of them, whatever one of them raises, which is raised at the end.
    void undo() {
        std::optional<py::error_already_set> error;
        for (; entered_ > 0; --entered_) {
            const py::object& module = modules_[entered_ - 1];
            const auto found = holds().find(module.ptr());
            if (found == holds().end()) {
                continue;
            }
            std::vector<unsigned long>& threads = found->second.threads;
            const auto own = std::find(threads.begin(), threads.end(), thread_);
            if (own != threads.end()) {
                threads.erase(own);
            }
            if (threads.empty()) {
                const py::object before = found->second.before;
                holds().erase(found);
                try {
                    set_mode(module.ptr(), before.ptr());
                } catch (const py::error_already_set& raised) {
                    error = raised;
                }
            }
        }
        if (error) {
            throw py::error_already_set(*error);
        }
    }

    std::vector<py::object> modules_;
    size_t entered_ = 0;
    unsigned long thread_ = 0;
};

// Inside EvalMode: modules in the modes that they had before, and then in eval mode again.
class OwnMode {
 public:
    explicit OwnMode(const py::list& modules) : modules_(objects_of(modules)) {}

    void enter() {
        const Lock lock;
        for (const py::object& module : modules_) {
            const auto found = holds().find(module.ptr());
            if (found != holds().end()) {
                set_mode(module.ptr(), found->second.before.ptr());
            }
        }
    }

    void exit(const py::args&) {
        const Lock lock;
        for (const py::object& module : modules_) {
            if (holds().count(module.ptr()) != 0) {
                set_mode(module.ptr(), Py_False);
            }
        }
    }

 private:
    std::vector<py::object> modules_;
};

// In a forked child, which has only the thread that forked: what other threads held is put back.
void release_other_threads() {
    const unsigned long own = PyThread_get_thread_ident();
    for (auto at = holds().begin(); at != holds().end();) {
        std::vector<unsigned long>& threads = at->second.threads;
        threads.erase(std::remove_if(threads.begin(), threads.end(), [&](unsigned long one) { return one != own; }),
                      threads.end());
        if (threads.empty()) {
            set_mode(at->first, at->second.before.ptr());
            at = holds().erase(at);
        } else {
            ++at;
        }
    }
}

template <class Change>
void define(py::module_& module, const char* name) {
    // The metaclass of Python's own classes, which stubs know.
    py::class_<Change>(module, name, py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
        .def(py::init<const py::list&>())
        .def("__enter__", &Change::enter)
        .def("__exit__", &Change::exit);
}

}  // namespace

void register_restored(py::module_& module) {
    define<Replaced>(module, "Replaced");
    define<EvalMode>(module, "EvalMode");
    define<OwnMode>(module, "OwnMode");
    module.def("release_other_threads", &release_other_threads);
}

}  // namespace onestep
