# The sessions of the chaos test: some that are left alone, and may meet no
# error, and some to which things happen.

package ChaosLoad;

use strict;
use warnings;

use ChaosActions;
use ChaosScripts;
use Exporter 'import';
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(
  $seed $rate $transactions begin_load finish_load start_struck finish_struck end_clients
);

# What draws are made, and how many transactions a second sessions begin that
# are left alone; 0 for as many as they can.
our $seed;
our $rate;

# How many transactions these sessions have made.
our $transactions = 0;

my $load;
my $load_number = 0;
my %script = calm_scripts();

# begin_load(SECONDS): starts the sessions that are left alone, for this long or
# until the server stops.
sub begin_load
{
	my ($duration) = @_;
	my @command = (
		$node->installed_command('pgbench'), '-n',
		'-M', any('simple', 'extended', 'prepared'),
		# Each its own thread: preparing a statement blocks all of a thread's
		# sessions, and one that waits may wait for another one of them.
		'-c', '6', '-j', '6',
		'-T', $duration > 1 ? int $duration : 1,
		'--random-seed', $seed + $load_number++,
		'-h', $node->host, '-p', $node->port);

	push @command, '-R', $rate if $rate;
	foreach my $name (sort keys %script)
	{
		my $file = $node->basedir . "/$name.sql";

		append_to_file($file, $script{$name}[1]) if !-e $file;
		push @command, '-f', "$file\@$script{$name}[0]";
	}
	record('load');
	$load = { out => '', err => '' };
	$load->{run} = IPC::Run::start([ @command, 'postgres' ],
		'<' => \undef, '>' => \$load->{out}, '2>' => \$load->{err});
	return;
}

# finish_load(UNDISTURBED): waits for its end, as a test.  No session that was
# left alone has met an error, other than that the server went away.
sub finish_load
{
	my ($undisturbed) = @_;
	my @errors;

	return if !$load;
	my $ok = $load->{run}->finish;
	@errors = grep {
		/(?:ERROR|FATAL|PANIC):/
		  && ( $undisturbed
			|| !/terminating connection due to administrator command|server is shutting down|system is shutting down|system is starting up|connection to server/
		  )
	} split /\n/, $load->{err};
	ok($ok, 'the sessions that were left alone have come to an end')
	  if $undisturbed;
	is(join("\n", @errors), '', 'no session that was left alone met an error');
	diag($load->{err}) if $undisturbed && !$ok;
	$transactions += $1
	  if $load->{out} =~ /transactions actually processed: (\d+)/;
	$load = undef;
	return;
}

# Sessions to which things happen, and sessions that get in the way of handlers
my %struck;

sub start_struck
{
	foreach my $name ('rough1', 'rough2', 'rough3', 'trouble1', 'trouble2')
	{
		my $file = $node->basedir . "/$name.sql";
		my $text;

		if (exists $struck{$name})
		{
			next if $struck{$name}->pumpable;
			$struck{$name}->finish;
		}
		$text =
		  $name =~ /rough/ ? rough_script(1000) : trouble_script(300);
		open(my $out, '>', $file) or die "$file: $!";
		print $out $text;
		close $out;
		$struck{$name} = IPC::Run::start(
			[
				$node->installed_command('psql'), '-XAtq',
				'-d', $node->connstr('postgres'), '-f', $file
			],
			'<' => '/dev/null',
			'>' => '/dev/null',
			'2>' => '/dev/null');
		$done{'sessions that were not left alone'}++;
	}
	return;
}

# Their clients go away.
sub end_clients
{
	foreach my $run (values %struck, $load ? $load->{run} : ())
	{
		$run->signal('TERM');
	}
	return;
}

sub finish_struck
{
	$_->finish foreach values %struck;
	%struck = ();
	return;
}

1;
