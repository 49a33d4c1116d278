# Completions of bbroker, bservice and brequest for fish. The flags are those that --help
# names, and the services those that the broker tells, if there is one.

function __backbone_services
    set -l words (commandline -opc)
    set -l broker
    for i in (seq (count $words))
        switch $words[$i]
            case --broker --host --port
                set -a broker $words[$i] $words[(math $i + 1)]
            case '--broker=*' '--host=*' '--port=*'
                set -a broker $words[$i]
        end
    end
    brequest -q -t 0.5 --list $broker 2>/dev/null | tail -n +2 | cut -f 1
end

# Whether there are so many operands: words that are no flags, and no values of flags.
function __backbone_operands --argument-names wanted
    set -l words (commandline -opc)
    set -l operands 0
    set -l before
    for word in $words[2..]
        if not contains -- "$before" $__backbone_valued; and not string match -q -- '-?*' $word
            set operands (math $operands + 1)
        end
        set before $word
    end
    test $operands -eq $wanted
end

set -g __backbone_valued
for tool in bbroker bservice brequest
    $tool --help 2>/dev/null | awk '/^ +-/ {
        sub(/^ +/, "")
        says = $0; if (!sub(/.*  /, "", says)) says = ""
        sub(/  .*/, "")
        for (i = split($0, flags, ", "); i > 0; i--) {
            split(flags[i], part, " ")
            if (part[1] ~ /^--/) takes = part[2] # and so does the short one before it
            print part[1] "\t" takes "\t" says
        }
    }' | while read --delimiter \t flag takes says
        set -l option (string replace -r -- '^--' '-l ' $flag | string replace -r -- '^-(.)$' '-s $1' | string split ' ')
        test -z "$takes"; or set -a __backbone_valued $flag
        switch "$takes"
            case ''
                complete -c $tool $option -d "$says"
            case DIR
                complete -c $tool $option -d "$says" -xa '(__fish_complete_directories)'
            case FILE
                complete -c $tool $option -d "$says" -rF
            case '*'
                complete -c $tool $option -d "$says" -x
        end
    end
end
complete -c bbroker -f
complete -c bservice -n '__backbone_operands 0' -fa '(__backbone_services)'
complete -c bservice -n '__backbone_operands 1' -fa '(__fish_complete_command)'
complete -c brequest -n '__backbone_operands 0' -fa '(__backbone_services)'
