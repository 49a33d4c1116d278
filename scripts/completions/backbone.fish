# fish completions for backbone, bbroker, bservice and brequest. The flags come from --help, and
# the service names from the broker, if one is running.

# Runs a tool, which may have no link.
function __backbone_run --argument-names tool
    if command -q $tool
        command $argv 2>/dev/null
    else
        command backbone $argv 2>/dev/null
    end
end

# Prints the names of the services.
function __backbone_services
    set -l words (commandline -opc)
    set -l broker
    for i in (seq (count $words))
        switch $words[$i]
            case -b --broker --host -p --port --broker-key --key
                set -a broker $words[$i] (string replace -r -- '^~/' $HOME/ $words[(math $i + 1)])
            case '-b*' '-p*' '--broker=*' '--host=*' '--port=*' '--broker-key=*' '--key=*'
                set -a broker $words[$i]
        end
    end
    __backbone_run brequest -q -t 0.5 --list $broker | tail -n +2 | cut -f 1
end

# Completes what follows backbone as the command of an applet. Its name may lack the b.
function __backbone_applet
    set -l words (commandline -opc)[2..]
    for applet in (__backbone_run backbone --list)
        if contains -- $applet $words[1] b$words[1]
            set words[1] $applet
            complete -C (string join -- ' ' (string escape -- $words) (commandline -ct))
            return
        end
    end
end

# Reports whether the number of operands is $wanted. An operand is a word that is neither a flag
# nor the value of a flag.
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

# The flags that take a value.
set -g __backbone_valued
for tool in backbone bbroker bservice brequest
    # The flags of backbone itself go before the name of an applet.
    set -l when
    test $tool != backbone; or set when -n '__backbone_operands 0'
    __backbone_run $tool --help | awk '/^ +(backbone )?-/ {
        sub(/^ +(backbone )?/, "")
        description = $0; if (!sub(/.*  /, "", description)) description = ""
        sub(/  .*/, "")
        for (i = split($0, flags, ", "); i > 0; i--) {
            split(flags[i], part, " ")
            if (part[1] ~ /^--/) takes = part[2] ~ /^</ ? "" : part[2] # also for the short flag, which comes next
            print part[1] "\t" takes "\t" description
        }
    }' | while read --delimiter \t flag takes description
        set -l option (string replace -r -- '^--' '-l ' $flag | string replace -r -- '^-(.)$' '-s $1' | string split ' ')
        test -z "$takes"; or set -a __backbone_valued $flag
        switch "$takes"
            case ''
                complete -c $tool $when $option -d "$description"
            case DIR
                complete -c $tool $when $option -d "$description" -xa '(__fish_complete_directories)'
            case FILE
                complete -c $tool $when $option -d "$description" -rF
            case WHERE
                complete -c $tool $when $option -d "$description" -xa 'log reply merge'
            case '*'
                complete -c $tool $when $option -d "$description" -x
        end
    end
end
complete -c backbone -f
complete -c backbone -n '__backbone_operands 0' -a '(__backbone_run backbone --list)'
complete -c backbone -n 'not __backbone_operands 0' -a '(__backbone_applet)'
complete -c bbroker -f
complete -c bservice -n '__backbone_operands 0' -fa '(__backbone_services)'
complete -c bservice -n '__backbone_operands 1' -fa '(__fish_complete_command)'
complete -c brequest -n '__backbone_operands 0' -fa '(__backbone_services)'
