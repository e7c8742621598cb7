# What the parts of the chaos test share: the server that it is about, the
# diary of what happens, how often each thing was done, and ways to do it.

package ChaosActions;

use strict;
use warnings;

use Exporter 'import';
use IO::Handle;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(
  $node %done $started open_diary record few any
  %undo undo_later undo_due strike try insist
  $is_worker $is_launcher $is_session
);

# The server.
our $node;

# How often what was done, by what the figures call it.
our %done;

# When it all began.
our $started = time;

# The diary of what happens, a file beside the server's log.
my $diary;

sub open_diary
{
	my $file = "$PostgreSQL::Test::Utils::log_path/090_chaos_events.log";

	open($diary, '>', $file) or die "$file: $!";
	$diary->autoflush(1);
	return;
}

# record(WHAT): writes it there, with the time.
sub record
{
	my ($what) = @_;

	printf $diary "%8.3f %s\n", time - $started, $what;
	return;
}

# A number that is, most often, small.
sub few { return int(rand(1) * rand($_[0])); }

# One of its arguments.
sub any { return $_[ int rand @_ ]; }

# Which rows of pg_stat_activity are whose.
our $is_worker = "backend_type = 'statbuffer worker'";
our $is_launcher = "backend_type = 'statbuffer launcher'";
our $is_session = "application_name IN ('rough', 'trouble')";

# What is to be undone after a while, by name: when, and how.
our %undo;

# undo_later(NAME, HOW[, WITHIN]): calls the function within this many seconds, by
# default 2, and again until it returns true.
sub undo_later
{
	my ($name, $how, $within) = @_;

	$undo{$name} = [ time + rand($within // 2), $how ];
	return;
}

# undo_due([ALL]): undoes what is to be undone by now, or all.  One thing may
# be in the way of another, so what does not work is tried again.
sub undo_due
{
	my ($all) = @_;

	foreach my $attempt (1 .. ($all ? 100 : 1))
	{
		foreach my $name (sort keys %undo)
		{
			my ($when, $how) = @{ $undo{$name} };

			delete $undo{$name} if ($all || time >= $when) && $how->();
		}
		return if !%undo;
		usleep(100_000) if $all;
	}
	die 'cannot undo: ' . join(', ', sort keys %undo) if $all;
	return;
}

# strike(WHAT, FUNCTION, CONDITION[, LIMIT]): calls a function of the server
# for some processes.  Returns for how many.
sub strike
{
	my ($what, $function, $condition, $limit) = @_;
	my $n = sql(
		"SELECT count(*) FILTER (WHERE $function(pid))
		 FROM (SELECT pid FROM pg_stat_activity WHERE $condition
			ORDER BY random() LIMIT " . ($limit // 1 + few(3)) . ') p');

	record("$what: $n");
	$done{$what} += $n;
	return $n;
}

# try(WHAT, STATEMENT): runs what may fail, and counts what did and what did
# not.
sub try
{
	my ($what, $statement) = @_;
	my ($status, $out, $err) =
	  $node->psql('postgres', "SET lock_timeout = '2s';\n$statement", on_error_stop => 1);

	$err =~ s/^psql:\S+ //;
	$err =~ s/\n.*//s;
	record("$what: $statement" . ($status == 0 ? '' : " -- $err"));
	$done{$what}++ if $status == 0;
	$done{"$what (refused)"}++ if $status != 0;
	return $status == 0;
}

# As try(), until it works.
sub insist
{
	my ($what, $statement) = @_;

	foreach my $attempt (1 .. 50)
	{
		return if try($what, $statement);
		usleep(100_000);
	}
	die "cannot do: $statement";
}

1;
